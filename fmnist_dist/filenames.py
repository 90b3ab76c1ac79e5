"""The names of a checkpoint's files."""

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
EMA = "ema.safetensors"
METRICS = "metrics.jsonl"  # rows since the parent checkpoint; outlives the tensors' retirement
