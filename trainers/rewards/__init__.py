"""How completions are rewarded.

    functions         RewardFunctions calls every reward function on a batch of completions and handles those that fail
    calls             one call of a function in this process: what it returned or why it failed, and its time limit
    workers           calls in worker processes, which can be killed
    model             a reward model (a sequence classifier) as a reward function
    process_settings  what is restored after user code has run: signal handlers, threads, current folder, streams

A reward that takes longer than `reward_timeout` is stopped in one of three places: `calls.run_within` interrupts a
plain function in the main thread, `calls.AsyncCalls` cancels an async one, and `workers.WorkerPool` kills the worker
process. `RewardFunctions` chooses the place; `calls.too_late` is the failure that all three report.
"""
