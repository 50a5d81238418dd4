"""What a workload costs on a device: device tables with every number sourced."""
