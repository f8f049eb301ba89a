"""From the laptop to a pod: one small specification of a job, and backends that print or run what it takes.

`gke` emits a JobSet, `tpu-vm` supervises queued resources, `local` starts real processes on this machine; `sky.yaml` is
for SkyPilot. Nothing here imports jax or the library: the launcher runs on a laptop that has neither.
"""
