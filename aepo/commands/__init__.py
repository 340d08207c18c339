"""The commands of `aepo`: one file for each group, flags in, printing out."""
