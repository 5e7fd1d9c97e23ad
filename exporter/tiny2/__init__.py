"""The trained model of the second generation that ships with the project; `recipes/tiny` made it."""
