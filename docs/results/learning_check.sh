#!/usr/bin/env bash
# The runs behind docs/results/README.md. From the root of the project, with the environment active:
#
#     DATA=folder JOBS=2 docs/results/learning_check.sh runs/check
#
# DATA holds hopper.hdf5, walker2d.hdf5 and halfcheetah.hdf5, the medium-v2 datasets; without DATA the scripts look
# for D4RL's own files as always. A run that has ended is skipped; one that was cut short starts anew.
set -euo pipefail
out=${1:?name a folder for the runs}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

job() { # name, script, robot, options
    local name=$1 script=$2 robot=$3 defaults=""
    case $script in # the defaults of the commit whose scores the page shows
    td3bc* | awac*) defaults="--online-sampling mix" ;;
    iql*) defaults="--actor-lr-schedule cosine" ;;
    esac
    echo "$name $script --env $robot-medium-v2 ${DATA:+--dataset-path $DATA/$robot.hdf5} $defaults ${*:4}"
}

jobs() {
    for seed in 1 2; do
        for lambda in 1 0; do
            for script in td3bc iql awac; do
                job "${script}_hopper_lambda${lambda}_seed$seed" ${script}_sera.py hopper \
                    --offline-steps 30000 --online-steps 10000 --sera-coef $lambda --seed $seed
            done
        done
    done
    for robot in walker2d halfcheetah; do
        job td3bc_${robot}_offline_seed1 td3bc_sera.py $robot --offline-steps 30000 --online-steps 0
    done
    for lambda in 1 0; do
        job sac_hopper_scratch_lambda${lambda}_seed1 sac_sera.py hopper --offline-steps 0 --mixing-ratio 0 \
            --online-steps 30000 --sera-coef $lambda
        for script in cql calql; do
            job "${script}_hopper_lambda${lambda}_seed1" ${script}_sera.py hopper --offline-steps 8000 \
                --online-steps 2000 --eval-every 2000 --sera-coef $lambda
        done
    done
    # What --bc-online of TD3+BC should be: keep is above.
    for mode in anneal drop; do
        for seed in 1 2; do
            for lambda in 1 0; do
                job "td3bc_hopper_${mode}_lambda${lambda}_seed$seed" td3bc_sera.py hopper --bc-online $mode \
                    --bc-anneal-steps 5000 --offline-steps 30000 --online-steps 10000 --sera-coef $lambda --seed $seed
            done
        done
    done
}

run() { # out, name, script, options
    local folder=$1/$2
    if [ -f "$folder/done" ]; then return; fi
    rm -rf "$folder"
    mkdir -p "$folder"
    if python "${@:3}" --run-dir "$folder/run" > "$folder/log" 2>&1; then
        touch "$folder/done"
        echo "$2: $(tail -1 "$folder/log")"
    else
        echo "$2 FAILED: $(tail -1 "$folder/log")"
    fi
}

export -f run
jobs | xargs -P "${JOBS:-1}" -L 1 bash -c 'run "$@"' run "$out"
