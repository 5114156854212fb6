"""Claims and comparisons: arms of ordinary ``lit`` runs over several seeds, checked for fairness, with a verdict.

``lit claims <technique>`` reads ``configs/claims/<technique>.yaml`` (:mod:`~lit_methods.claims.study`), refuses keys that don't exist
(:mod:`~lit_methods.claims.keys`), resolves the configs of all stages and gives each a key of its content
(:mod:`~lit_methods.claims.plan`), refuses arms with unequal chances (:mod:`~lit_methods.claims.fairness`), says how long it will take
(:mod:`~lit_methods.claims.duration`), runs what isn't there yet in processes of their own (:mod:`~lit_methods.claims.runner`), judges the
paired differences (:mod:`~lit_methods.claims.verdict`), times both arms in turn (:mod:`~lit_methods.claims.cost`), and writes
``<root>/<technique>/summary.json`` (:func:`lit_methods.claims.summary.summarise` lists its keys) and the evidence page
(:mod:`~lit_methods.claims.evidence`). ``lit compare <family>`` does the same with ``configs/compare/<family>.yaml``.
"""

from lit_methods.claims.verdict import Verdict, judge

__all__ = ["Verdict", "judge"]
