# Runs a program and kills it when the process that started this shell is gone.
# Standard input is a pipe held by that process: it closes when the process ends, however it ends.
# Usage: sh -c "<this>" <name> <log file> <program> [argument...]
log=$1
shift
exec 3<&0
"$@" 3<&- </dev/null >>"$log" 2>&1 &
child=$!
(
    read -r _ <&3
    kill -KILL "$child"
) >/dev/null 2>&1 &
watcher=$!
echo "$child"
exec >/dev/null 2>&1 3<&-
wait "$child"
code=$?
kill -KILL "$watcher"
exit "$code"
