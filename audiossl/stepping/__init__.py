"""How does a step end without the host waiting for the device, and what may that not change?"""
