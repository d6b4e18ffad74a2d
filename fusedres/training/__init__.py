"""Training of the package's networks: what ``fusedres train`` and ``fusedres demo`` run.

``config`` holds the settings, ``data`` the images, ``networks`` the models by name and their plain PyTorch twins,
``learner`` one optimisation step, ``trainer`` the epochs, checkpoints and logs around it, ``comparison`` the demo's
eager-against-fused run and ``plots`` its picture.
"""
