"""The trained model that ships with the project; `recipes/tiny` made it."""
