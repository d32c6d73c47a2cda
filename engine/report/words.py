"""What the figures of a report are called in plain words. Their definitions are in docs/evaluation.md."""

from __future__ import annotations

_METRICS = {
    "loss": "what training makes small, mean over {units}",
    "rewards/chosen": "mean reward of chosen responses",
    "rewards/rejected": "mean reward of rejected responses",
    "rewards/accuracies": "share of {units} whose rewards are in the right order",
    "rewards/margins": "mean reward of chosen less that of rejected responses",
    "rewards/accuracies_chosen_longer": "rewards/accuracies where the chosen response is the longer one",
    "rewards/accuracies_chosen_shorter": "rewards/accuracies where the chosen response is the shorter one",
    "logps/chosen": "mean log-prob of a whole chosen response, nats",
    "logps/rejected": "mean log-prob of a whole rejected response, nats",
    "logits/chosen": "mean logit over vocabulary and chosen tokens",
    "logits/rejected": "mean logit over vocabulary and rejected tokens",
    "entropy": "mean entropy of the next token, nats",
    "mean_token_accuracy": "share of chosen tokens that are the model's first choice",
    "aux_loss": "load-balancing loss of the experts",
    "kl": "divergence from the reference that KTO measures rewards from, nats",
    "count/chosen": "desirable rows",
    "count/rejected": "undesirable rows",
    "num_pairs": "{units} evaluated",
    "ranking_accuracy": "share of pairs whose chosen response is the likelier one",
    "ranking_accuracy_per_token": "the same by the mean log-prob of a token",
    "reference_ranking_accuracy": "ranking accuracy of the reference",
    "reference_ranking_accuracy_per_token": "the same by the mean log-prob of a token",
    "idealized_ranking_accuracy": "ranking accuracy of the best policy that the loss has",
    "rankings_gained": "share of pairs ranked right here and wrong by the reference",
    "rankings_lost": "share of pairs ranked wrong here and right by the reference",
    "logps_change/chosen": "how much likelier chosen responses became, nats",
    "logps_change/rejected": "how much likelier rejected responses became, nats",
    "chosen_fell": "share of chosen responses that became less likely",
    "calibration_error": "gap between how sure the reward is and how often it is right",
    "preference_share_error": "squared distance of predicted and observed preference, pairs judged more than once",
    "num_repeated_pairs": "pairs judged more than once",
    "length_bias": "correlation of the reward margin with the difference in length",
    "sampled/kl": "divergence from the reference on the model's own answers, nats",
    "sampled/kl_k3": "the same by an estimator that varies less, nats",
    "sampled/kl_per_token": "the same for one token, nats",
    "sampled/num_samples": "answers drawn",
    "sampled/sample_length": "mean length of an answer, tokens",
}


def words_of(metric: str, unit: str) -> str:
    """A metric without ``eval_`` or the name of its set, in a few words; empty for one that is not known.

    Args:
        unit: ``pairs`` or ``rows``.
    """
    return _METRICS.get(metric, "").format(units=unit)


def glossary(unit: str, *, has_reference: bool) -> list[tuple[str, str]]:
    """Terms that a reader of a report meets, and what they mean for this loss."""
    better = "the response that was preferred to another, the rejected one"
    if unit == "rows":
        better = "a response that was labelled desirable; those that were not are called rejected"
    of = "how much likelier it is than under the reference" if has_reference else "how likely the policy finds it"
    terms = [
        ("policy", "the model that is trained"),
        *([("reference", "the model that it is held close to, mostly the one before training")] * has_reference),
        ("chosen", better),
        ("reward", f"the policy's own score of a response: {of}, by the definition of the loss"),
        ("margin", "the reward of chosen less that of rejected responses; training raises it"),
        ("held-out", f"{unit} that training does not see, so the honest ones to look at"),
        ("nat", "unit of log-probs: one nat more makes a text 2.7 times as likely"),
        ("±", "standard error: what another draw of as much data might change"),
    ]
    if has_reference:
        terms.append(
            ("KL", "divergence: how far the policy's answers are from the reference's, in nats; 0 for no change")
        )
    return terms


_OF_TRAINING = (
    ("epoch", "once through all training rows"),
    ("prompt sharing", "a prompt is computed once for all of its responses"),
    ("padding", "places that are computed and hold no token"),
    ("gradient norm", "how steep the loss is; above a limit the gradient is scaled down to it"),
    ("MFU", "model FLOP utilisation: arithmetic (FLOP) that the model needs, over what this machine does in that time"),
)


def training_terms(unit: str) -> list[tuple[str, str]]:
    """What a reader of a report on one run meets beside ``glossary``."""
    group = ("preference group", "a prompt with the responses to it that are compared; a pair has two")
    return [*([group] if unit == "pairs" else []), *_OF_TRAINING]
