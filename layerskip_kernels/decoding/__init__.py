"""Decoding on one paged cache: prefill, draft_step, verify_step, commit; sampling; what every exit would say."""
