"""What a workload costs on a device: device tables with every number sourced."""

from edgewise.cost import devices

__all__ = ["devices"]
