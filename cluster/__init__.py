"""Machines: checks of this one and of a cluster's, a cluster on one machine, jobs on any Ray cluster."""
