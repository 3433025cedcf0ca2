"""Previews: one way of drawing (`drawing`), in a process of its own (`beside`, `child`) or between steps (`between`).

Nothing is imported here: the process that draws steps back before it loads a library.
"""
