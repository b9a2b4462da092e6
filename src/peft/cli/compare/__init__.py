"""`peft compare`: many methods on one classification task, each trained alike, in one table and one picture."""
