# The line protocol of hosts/run.py, for the sqlite3 shell: line_protocol.py says what it is.
# serve TABLE reads what follows in the shell's own language from its standard input, then serves.

serve() {
    local table=$1 line text output said
    coproc SHELL_PROCESS { exec sqlite3 -batch 2>&1; }
    # Runs what $1 says; its output is in `output`.
    ask() {
        printf '%s\n.print -- end --\n' "$1" >&"${SHELL_PROCESS[1]}"
        output=
        while IFS= read -r said <&"${SHELL_PROCESS[0]}" && [ "$said" != '-- end --' ]; do output+=$said; done
    }
    ask "$(cat)"
    [ -z "$output" ] || { echo "error $output"; exit 1; }
    ask '.timeout 0'
    ask 'SELECT sqlite_version();'
    echo "ready $output"
    while IFS= read -r line <&3; do
        text=${line#* }
        case $line in
            begin) ask 'BEGIN IMMEDIATE;' ;;
            write\ *) ask "INSERT INTO $table VALUES ('${text//\'/\'\'}');" ;;
            commit) ask 'COMMIT;' ;;
            count) ask "SELECT count(*) FROM $table;" ;;
            *) output="error: unknown command $line" ;;
        esac
        case $output in
            *'rror'*'database is locked (5)') echo busy ;;
            *rror*) echo "error $output" ;;
            *) echo "ok${output:+ $output}" ;;
        esac
    done
}
