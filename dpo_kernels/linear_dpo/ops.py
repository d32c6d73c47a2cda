"""``torch.library`` registration of the paired loss: scoring from the loss table, dispatch, autograd.

Legend: T rows (tokens), D features, V vocabulary, P pairs, S = 2 P responses in order chosen_0, rejected_0, chosen_1, ...

The op returns the reduced loss *and* its gradients, formed in one pass over whole pairs: logits -> log-sum-exp ->
log-prob sums -> loss and its slopes -> gradients (3 products of the size of the logits product). That is right because
the reduced loss has a single scalar upstream gradient. Losses that couple pairs, and reduction "none", do not come here.

An implementation is a module beside this one. Conventions for tensors are those of ``dpo_kernels.linear_logps.ops``
(below autograd, autocast off, T > 0, unit stride along D, valid int64 labels, no mutation, no synchronisation of a CUDA
device, same bits when run twice).

``why_not(device_type, dtype) -> str | None``
    (Triton only.) As in ``dpo_kernels.linear_logps.ops``.
``forward(hidden_TD, weight_VD, labels_T, cu_responses, score_pairs, bias_V, softcap, logit_scale, temperature,
ignore_index, need_hidden, need_weight, need_bias) -> (losses_P, logps_S, dX_TD | None, dW_VD | None, db_V | None)``
    ``cu_responses`` is a list of S + 1 Python ints, the offsets of the responses in the rows, from 0 to T, not
    decreasing; responses may be empty. ``score_pairs(logps, first_pair) -> (losses, slopes)`` is the only source of loss
    mathematics: it takes the log-prob sums of consecutive whole pairs from ``first_pair`` on, [2 p] float32 (float64),
    on the device of hidden, contiguous, and returns the losses of the pairs, [p], and d (reduced loss) / d logps, [2 p], in
    which pair weights and the divisor of the mean are included. It launches a few tiny torch kernels and never
    synchronises. A row's gradient is then slope[response of the row] * d logps_t. Every pair must be scored exactly once.
    Ignored rows add 0 to their response and get gradient exactly 0.
"""
