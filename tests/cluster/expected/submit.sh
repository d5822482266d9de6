#!/usr/bin/env bash
# Submits the jobs of study demo, each after those that it needs.

set -euo pipefail
cd /home/me/weak-to-strong
teacher=$(sbatch --parsable runs/demo/submit/1-teacher.sbatch)
capture=$(sbatch --parsable --dependency="afterok:$teacher" --kill-on-invalid-dep=yes runs/demo/submit/2-capture.sbatch)
cache=$(sbatch --parsable --dependency="afterok:$teacher,afterany:$capture" --kill-on-invalid-dep=yes runs/demo/submit/3-cache.sbatch)
students=$(sbatch --parsable --dependency="afterok:$cache" --kill-on-invalid-dep=yes runs/demo/submit/4-students.sbatch)
report=$(sbatch --parsable --dependency="afterany:$students" --kill-on-invalid-dep=yes runs/demo/submit/5-report.sbatch)
echo "submitted: teacher=$teacher capture=$capture cache=$cache students=$students report=$report"
