"""Adapter files between two libraries of one interface: each saves, the other loads, answers and saves again.

Public names alone are used (through `matrix.probe`), so any interpreter's `peft` can stand on either side.
"""
