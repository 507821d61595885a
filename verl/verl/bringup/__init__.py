"""What a machine must show before it trains: `bash scripts/check_gpu.sh`, or `python -m verl.bringup`."""
