"""From data sets to tensors: Minari libraries, the PointMaze collector, and what training reads."""
