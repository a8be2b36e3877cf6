"""Measurements: what a user compares on the own machine.

Owns contests in which contenders take turns, and their reports. Measurements for the development of Cordée stand in
`benchmarks/`, outside of the package."""
