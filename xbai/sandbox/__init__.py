"""Running Python code that nobody vouches for: `process.py` has the `Sandbox`, `job.py` what goes in and out.

One harness process (`supervisor.py`, inside bubblewrap where that works) forks a child for each job. The child
(`program.py`) reads the job, gives up its privileges (`confine.py`: rlimits, capabilities, Landlock, seccomp), and
runs the program, which then can start no process, open no socket and write no file. The harness watches wall clock,
output and threads. Children have the harness's memory, in which therefore no job's source, input or output ever is;
expected outputs do not leave the grader. Without seccomp nothing is run. The harness imports nothing outside this
package, which imports nothing heavy. It needs Linux.
"""
