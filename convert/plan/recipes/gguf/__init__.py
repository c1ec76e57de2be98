"""`--to gguf`: files for llama.cpp, experts in MXFP4, everything else in BF16 and float32, exactly."""
