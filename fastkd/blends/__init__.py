"""Texts that exist, mixed from several sources, as rollouts that the teacher can score and the student train on.

``stream.open_blend`` is the way in. Nothing is imported here: ``named`` must stay free of torch.
"""
