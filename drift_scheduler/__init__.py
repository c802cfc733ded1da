"""Prefill and decode at the same time on disjoint parts of one device.

Engine-agnostic: an engine implements `gang.Engine`, a device provides lanes, a dispatcher decides.
"""
