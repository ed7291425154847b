"""Fine-tuning jobs that outlive a process: their data, their store, their service."""
