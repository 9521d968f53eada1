"""The losses of the trainers, and the advantages that go into them.

advantages  GRPO's: from rewards to what each completion, or token, is worth
objectives  GRPO's losses: a loss_type as options of rlkernels.policy_loss
likelihood  SFT's losses: nll and dft
router      the loss by which a mixture of experts uses all of its experts

DPO's losses are rlkernels.preference_loss, reward models' rlkernels.reward_pair_loss, PPO's stand in ppo.py.
"""
