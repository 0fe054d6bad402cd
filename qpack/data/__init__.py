"""Training data: from files to tokens and labels. Importing this package loads neither torch nor transformers."""
