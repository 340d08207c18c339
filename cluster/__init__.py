"""Operating machines: is this one fit to train and evaluate?"""
