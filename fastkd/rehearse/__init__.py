"""``--rehearse``: a recipe's whole topology on simulated nodes of this machine, with tiny models in place of its own.

A job of eleven nodes that fails after an hour in the queue fails for small reasons: a tensor-parallel degree that does
not divide the heads, a role that gets no node, a checkpoint that does not resume. Those need no large model to show.
So the recipe is loaded, checked, shrunk (``shrink``) and then run by the code that runs it on the cluster: two steps,
validation, save, a new run that resumes, one step more (``command``). Nothing in it is a stand-in but the sizes
(``sizes``), the weights and the texts (``stand_ins``).
"""
