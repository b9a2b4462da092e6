"""Adapter files of other programs: conversion to and from them, exactly or not at all."""

from .format import Report
from .formats import FORMATS
from .names import Base
from .part import ConversionError
from .run import convert_adapter

__all__ = ["FORMATS", "Base", "ConversionError", "Report", "convert_adapter"]
