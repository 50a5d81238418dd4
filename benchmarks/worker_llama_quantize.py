"""llama.cpp's own quantiser on one file, whose messages it prints: python worker_llama_quantize.py IN OUT TYPE [pure]

TYPE as llama.cpp names a file's type, such as Q2_K. pure: every matrix in that type, embedding and head in Q8_0.
"""

from __future__ import annotations

import sys


def main() -> None:
    import llama_cpp

    source, target, kind, *rest = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = 2
    if "pure" in rest:
        parameters.pure = True
        parameters.token_embedding_type = parameters.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters)
    if status != 0:
        raise SystemExit(f"llama_model_quantize gave {status}")


if __name__ == "__main__":
    main()
