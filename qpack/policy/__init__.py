"""What is packed, how, and why the rest is not: from a model's config and the headers of its files to a plan.

`modules` makes the plan, in the words of `plan`. `families` and `structure` are the two ways to know a model, in the
words of `roles`. `encoded` reads sources that are quantized already, `rules` and `budget` change what is decided, and
`skipping` tells loaders of it.
"""
