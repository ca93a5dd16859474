"""What is wrong with a data set: findings with paths, the page that shows them, and the list of what is left out."""
