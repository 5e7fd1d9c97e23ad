/* The part of onnxruntime's C interface that a custom operator needs, declared here so that building this needs no
 * header of onnxruntime's.
 *
 * The interface is a table of function pointers that only ever grows at its end, so a pointer's place in it is
 * fixed for good. Places and signatures are those of include/onnxruntime/core/session/onnxruntime_c_api.h; the last
 * one used here, KernelContext_ParallelFor, came with version 17 of the interface.
 */
#ifndef GEMMA_EXPORT_ONNXRUNTIME_ABI_H
#define GEMMA_EXPORT_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ORT_INTERFACE_VERSION 17
#define ORT_INVALID_ARGUMENT 2
#define ORT_OUT_OF_MEMORY 1 /* ORT_FAIL: the interface has no code of its own for it. */
#define ORT_TENSOR_FLOAT 1  /* As in TensorProto.DataType. */
#define ORT_TENSOR_UINT8 2
#define ORT_TENSOR_INT32 6
#define ORT_MEMORY_DEFAULT 0
#define ORT_REQUIRED 0 /* Of an input or output. */
#define ORT_OPTIONAL 1

typedef struct OrtStatus OrtStatus; /* NULL is success. */
typedef struct OrtValue OrtValue;
typedef struct OrtShapeInfo OrtShapeInfo; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtCustomOp OrtCustomOp;

typedef struct OrtApi {
    OrtStatus *(*CreateStatus)(int code, const char *message); /* 0 */
    void *unused_1[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **out);      /* 26 */
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);   /* 27 */
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain); /* 28 */
    void *unused_29[22];
    OrtStatus *(*GetTensorMutableData)(const OrtValue *value, void **out); /* 51 */
    void *unused_52[9];
    OrtStatus *(*GetDimensionsCount)(const OrtShapeInfo *info, size_t *out);                /* 61 */
    OrtStatus *(*GetDimensions)(const OrtShapeInfo *info, int64_t *values, size_t count);   /* 62 */
    void *unused_63[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtShapeInfo **out); /* 65 */
    void *unused_66[19];
    OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name, float *out);   /* 85 */
    OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *out); /* 86 */
    void *unused_87[3];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index,
                                         const OrtValue **out); /* 90 */
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *dimensions,
                                          size_t count, OrtValue **out); /* 91 */
    void *unused_92[1];
    void (*ReleaseStatus)(OrtStatus *status); /* 93 */
    void *unused_94[5];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtShapeInfo *info); /* 99 */
    void *unused_100[1];
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain); /* 101 */
    void *unused_102[135];
    OrtStatus *(*HasSessionConfigEntry)(const OrtSessionOptions *options, const char *key, int *out); /* 237 */
    void *unused_238[11];
    OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t index, int *is_constant,
                                                    const OrtValue **out); /* 249 */
    void *unused_250[24];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*function)(void *data, size_t index),
                                            size_t total, size_t batches, void *data); /* 274 */
} OrtApi;

_Static_assert(offsetof(OrtApi, AddCustomOpDomain) == 28 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, GetTensorMutableData) == 51 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, GetDimensions) == 62 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, GetTensorTypeAndShape) == 65 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, KernelInfoGetAttribute_int64) == 86 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, KernelContext_GetOutput) == 91 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, ReleaseStatus) == 93 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, ReleaseTensorTypeAndShapeInfo) == 99 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, ReleaseCustomOpDomain) == 101 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, HasSessionConfigEntry) == 237 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, KernelInfoGetConstantInput_tensor) == 249 * sizeof(void *), "a place in the table is wrong");
_Static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * sizeof(void *), "a place in the table is wrong");

typedef struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version); /* NULL where onnxruntime is older. */
    const char *(*GetVersionString)(void);
} OrtApiBase;

/* An operator. What has to do with aliases and variadic inputs is not used here, but has its place. */
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *op);
    int (*GetInputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *op);
    int (*GetOutputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *op, void *context);
    int (*GetStartVersion)(const OrtCustomOp *op);
    int (*GetEndVersion)(const OrtCustomOp *op);
    void *unused_aliases[4];
};

#endif
