/* How the rows of a weight are shared out where reading them is the work. */
#ifndef GEMMA_EXPORT_STRETCHES_H
#define GEMMA_EXPORT_STRETCHES_H

#include "pool.h"

/* Calls `function` for pieces of at most `piece` rows that make up [0, rows) together; rows are below 2^32.
 *
 * Each thread reads a stretch of its own from end to end, piece by piece, and one that has come to its end takes half of
 * what another has left. Memory is then read in as many streams as there are threads, each long; where threads take
 * turns at the pieces, their streams are cut up, and together they read a fifth less. */
void in_stretches(const Pool *pool, void (*function)(void *data, size_t first, size_t last), size_t rows, size_t piece,
                  void *data);

#endif
