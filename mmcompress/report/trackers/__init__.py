"""Servers that keep the results of runs; one file for each kind."""
