"""The trained model of the first generation that ships with the project; `recipes/tiny` made it."""
