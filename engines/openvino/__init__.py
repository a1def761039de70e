"""OpenVINO: bfloat16 and 8-bit products on the CPUs that have them. Intel's GPUs and NPUs are untested."""
