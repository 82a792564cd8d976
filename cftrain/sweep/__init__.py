"""Many runs from one plan: cohorts x models x encoders x seeds, on one machine or many.

plan.py reads plan.toml; jobs.py tells from the files how far each job is; work.py does one; engines.py does many on
this machine (`cftrain.ray_jobs`: on a cluster); running.py does what is missing, and compares the runs. Modules are
imported by name: plan.py and jobs.py load no torch.
"""
