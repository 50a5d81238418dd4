"""Which techniques of on-device language models are here: the checklist of a review, row by row.

Xu et al., "On-Device Language Models: A Comprehensive Review", 2024, arXiv:2409.00088: its taxonomy as a checklist.
A row marked `have` names a function and a test that runs the technique on and off and asserts the stated effect and
its sign; tests/papers/test_coverage.py refuses a row that claims what no test shows. `partial`: something of it is
here, and `missing` says what is not. Rows that are missing altogether are listed too: a checklist has its gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgewise.core.report import Quantity, Report, Table

__all__ = ["AREAS", "ROWS", "Row", "coverage_report"]

Status = Literal["have", "partial", "missing"]
AREAS = ("foundations", "architectures", "compression", "hardware and runtime", "adaptation and protection")


@dataclass(frozen=True)
class Row:
    """module, function: where it is. test: path::name of the test that switches it on and off; effect: what the test
    asserts. missing: what a partial row lacks."""

    id: str
    area: str
    technique: str
    reference: str
    status: Status = "missing"
    module: str = ""
    function: str = ""
    test: str = ""
    effect: str = ""
    missing: str = ""


_F, _A, _C, _H, _U = AREAS
_TEST = "tests/papers/test_techniques.py::"
ROWS: tuple[Row, ...] = (
    Row("F1", _F, "indicators: latency, memory, storage, energy", "MELT, arXiv:2403.12844", "have",
        "edgewise.engine.bench", "bench", _TEST + "test_f1_indicators_move_with_the_model",
        "eight layers instead of one: more bytes stored, read and held; joules with a meter, none without"),
    Row("F2", _F, "bits against quality", "arXiv:2212.09720", "have", "edgewise.core.numbers", "quantize",
        _TEST + "test_f2_more_bits_less_divergence", "each step from 8 to 2 bits raises the divergence from float"),
    Row("F3", _F, "training on the device", "OpenELM, arXiv:2404.14619; arXiv:2206.15472"),
    Row("F4", _F, "cloud against edge", "the review itself"),
    Row("A1", _A, "shared embedding, grouped-query attention", "MobileLLM, arXiv:2402.14905", "partial",
        "edgewise.engine.memory", "kv_bytes", _TEST + "test_a1_fewer_key_heads_less_cache",
        "a quarter of the key heads: a quarter of the KV cache; off: as many as query heads",
        "sharing of whole blocks between layers"),
    Row("A2", _A, "tiny-model recipe: vocabulary, depth, inheritance", "PanGu-pi Pro, arXiv:2402.02791"),
    Row("A3", _A, "sharding between edge and cloud", "EdgeShard, arXiv:2405.14371"),
    Row("A4", _A, "speculative decoding", "LLMCad, arXiv:2309.04255"),
    Row("A5", _A, "several precisions from one file", "Any-Precision LLM, arXiv:2402.10517"),
    Row("A6", _A, "processing in memory", "Aquabolt-XL"),
    Row("A7", _A, "KV chunks compressed and swapped", "LLMaaS, arXiv:2403.11805"),
    Row("A8", _A, "mixture of experts on the edge", "EdgeMoE, arXiv:2308.14352"),
    Row("A9", _A, "state space and attention", "Zamba2"),
    Row("A10", _A, "routing between specialists", "Octopus v4, arXiv:2404.19296"),
    Row("A11", _A, "windowed attention, KV quantisation and eviction", "StreamingLLM, KIVI", "partial",
        "edgewise.engine.model", "LanguageModel", _TEST + "test_a11_a_coarser_cache_is_smaller_and_less_exact",
        "int8 and int4 caches: smaller than fp32 and further from its logits, int4 most",
        "sinks, eviction, per-channel keys"),
    Row("Q1", _C, "rounding with error compensation", "GPTQ, arXiv:2210.17323", "have",
        "edgewise.compress.quantize.gptq", "quantize_layer", _TEST + "test_q1_errors_are_made_up_for",
        "three bits on correlated inputs: at most 0.7 of the product error of rounding; off, told of no correlation, "
        "rounding to the bit"),
    Row("Q2", _C, "activation-aware scaling", "AWQ, arXiv:2306.00978", "have", "edgewise.compress.quantize.awq",
        "scales_of", _TEST + "test_q2_weights_of_large_inputs_are_scaled_up",
        "a few large inputs: at most 0.8 of the product error of rounding; off, alpha 0 alone, rounding to the bit"),
    Row("Q3", _C, "outliers apart", "LLM.int8, arXiv:2208.07339", "have", "edgewise.compress.quantize.llm_int8",
        "quantize_layer", _TEST + "test_q3_outliers_apart",
        "outlier inputs with large weights: a fifth of the product error of int8; off, no threshold, rounding to the "
        "bit"),
    Row("Q4", _C, "rounding with low-rank compensation", "ZeroQuant-V2, arXiv:2303.08302", "have",
        "edgewise.compress.quantize.lorc", "compensated", _TEST + "test_q4_the_residual_to_a_low_rank",
        "each rank lowers the error of two-bit weights; off, the rounded part alone, rounding to the bit"),
    Row("Q5", _C, "ternary training", "BitNet b1.58, arXiv:2402.17764", "have", "edgewise.train.bitnet",
        "ternary_weight", _TEST + "test_q5_training_in_ternary_beats_rounding_to_it",
        "a network trained with ternary weights: under half the loss of the same one trained in float, then rounded"),
    Row("Q6", _C, "quantisation-aware training, smoothing, NF4", "LLM-QAT, SmoothQuant, QLoRA", "have",
        "edgewise.train.qat", "train_phases", _TEST + "test_q6_training_smoothing_and_normal_floats_each_help",
        "trained in 4 bits: less loss than rounded to 4 bits; smoothed: less error where inputs have outliers; NF4: "
        "less error than INT4 on normal weights"),
    Row("P1", _C, "unstructured pruning", "SparseGPT, Wanda", "have", "edgewise.compress.prune.masks", "by_sparsegpt",
        _TEST + "test_p1_masks_that_know_the_inputs",
        "half of the weights zero, correlated inputs: less product error by Wanda than by magnitude, and least by "
        "SparseGPT; off, a share of nothing, the weight to the bit"),
    Row("P2", _C, "structured pruning", "LLM-Pruner, Sheared-LLaMA", "partial", "edgewise.compress.surgery.operations",
        "cut", _TEST + "test_p2_cut_units_are_fewer_bytes_and_operations",
        "heads and neurons cut out: fewer bytes read and fewer products for each token, and the same answers where "
        "they were zero; off, all kept, the same bits", "masks that are learned under a target shape (Sheared-LLaMA)"),
    Row("P3", _C, "contextual sparsity", "PowerInfer, arXiv:2312.12456; R-Sparse, arXiv:2504.19449", "partial",
        "edgewise.compress.lowrank.r_sparse", "sparse_layer", _TEST + "test_p3_inputs_chosen_for_each_token",
        "half of the inputs, chosen for each token: under half of the product error of one half for all tokens; off, a "
        "sparsity of nothing, every input is read and the weight is as it was",
        "neurons predicted before their layer; hot and cold ones in memories of their own"),
    Row("D1", _C, "distillation", "MiniLLM, arXiv:2306.08543", "partial", "edgewise.train.distill", "distill",
        _TEST + "test_d1_a_student_comes_nearer_to_its_teacher",
        "a cut model comes nearer to the one it was cut from, by forward and by reverse KL and on policy; off, at a "
        "vanishing rate, it stays where it was", "the policy gradient of MiniLLM; sequence-level distillation"),
    Row("R1", _C, "low-rank factors", "arXiv:2310.11028; SVD-LLM, arXiv:2403.07378", "have",
        "edgewise.compress.lowrank.decompose", "whitened", _TEST + "test_r1_two_thin_factors_that_know_the_inputs",
        "correlated inputs: less product error than the SVD of the same rank, and less with each rank; off, all ranks, "
        "the weight to rounding; random vectors and 8-bit factors: within a tenth of the least error; ranks go where "
        "energy falls slowly"),
    Row("V1", _C, "a smaller vocabulary", "PanGu-pi Pro, arXiv:2402.02791"),
    Row("H1", _H, "edge runtimes: a native path and common files", "llama.cpp, MNN, ExecuTorch", "have",
        "edgewise.engine.loading", "load", _TEST + "test_h1_the_native_path_reads_packed_weights",
        "packed 4-bit weights: under a third of the bytes that float32 moves per token, through a GGUF file, and the "
        "same answer as their dequantised twin within the bound of int8 inputs"),
    Row("H2", _H, "edge-cloud runtimes: paged KV, batches, HTTP", "MLC-LLM, vLLM"),
    Row("H3", _H, "GPU, NPU, DSP: roofline and device tables", "llm.npu, arXiv:2407.05858", "partial",
        "edgewise.engine.bench", "modelled_joules", _TEST + "test_h3_a_device_table_prices_a_step",
        "a table with energy numbers gives joules that follow its rates; a table without gives none",
        "static int8 graphs for NPUs"),
    Row("H4", _H, "co-design of in-memory computing", "arXiv:2306.06923"),
    Row("H5", _H, "weights from flash", "LLM in a flash, arXiv:2312.11514"),
    Row("H6", _H, "scheduling over CPU, GPU and NPU", "PowerInfer-2, arXiv:2406.06282"),
    Row("U1", _U, "personalisation, continual learning", "the review's sections"),
    Row("U2", _U, "federated and private adaptation", "FedAvg, DP-SGD"),
    Row("U3", _U, "several modalities", "MobileVLM V2, arXiv:2402.03766"),
    Row("U4", _U, "agents and function calls", "Octopus v2, arXiv:2404.01744"),
    Row("U5", _U, "retrieval and long context", "Dolphin"),
    Row("U6", _U, "privacy and security", "the review's open problems"),
    Row("U7", _U, "task score and device meter in one report", "MobileAIBench, arXiv:2406.10290", "partial",
        "edgewise.fit", "fit", _TEST + "test_u7_a_budget_and_its_cost_in_one_report",
        "a smaller budget: fewer bytes and lower quality, both in one report; off: the source itself, quality 1",
        "task suites beside divergence from the source"),
)


def coverage_report(area: str | None = None) -> Report:
    """The checklist and its counts. area: only rows of this area."""
    from edgewise.core.errors import InvalidValueError

    if area is not None and area not in AREAS:
        raise InvalidValueError(f"no area {area!r}; there are {', '.join(AREAS)}")
    rows = [row for row in ROWS if area in (None, row.area)]
    counts = [(name, *(sum(row.area == name and row.status == status for row in rows)
                       for status in ("have", "partial", "missing"))) for name in AREAS if area in (None, name)]
    here = [row for row in rows if row.status != "missing"]
    return Report("Coverage of the review's checklist", (
        Quantity("rows", len(rows)), *(Quantity(status, sum(row.status == status for row in rows))
                                       for status in ("have", "partial", "missing"))), (
        Table("By area", ("area", "have", "partial", "missing"), tuple(counts)),
        Table("Here", ("row", "technique", "status", "function", "test", "effect asserted", "missing"), tuple(
            (row.id, row.technique, row.status, f"{row.module}.{row.function}", row.test, row.effect, row.missing)
            for row in here)),
        Table("Not here yet", ("row", "technique", "reference"), tuple(
            (row.id, row.technique, row.reference) for row in rows if row.status == "missing"))))
