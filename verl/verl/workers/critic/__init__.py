"""The value function of PPO with GAE."""
