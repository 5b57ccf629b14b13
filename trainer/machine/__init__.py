"""What a machine is and can do: devices, software, links between ranks, health."""
