"""Tests of what scripts/ has."""
