"""One optimizer step's machinery: the network on its device, DeepSpeed behind a protocol, optimizer, averages."""
