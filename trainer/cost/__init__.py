"""What a run costs: the ledger, its bill in device-hours, TPUv3-core-days, energy and money, and the paper's own."""
