"""Flow 3, choose: a pool of experts -> rounds of trials -> the mixture to keep, and why."""
