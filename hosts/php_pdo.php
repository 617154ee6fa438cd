<?php
// PHP's PDO, opened by URI. php.ini, or the command line: sqlite3.extension_dir = the folder of libkanbanlock.so.

$kanbanlock = getenv('KANBANLOCK');
$database = getenv('DATABASE');
if ($kanbanlock) {
    // kanbanlock: load
    (new SQLite3(':memory:'))->loadExtension('libkanbanlock.so');
    // kanbanlock: open
    $db = new PDO("sqlite:file:$database?vfs=kanbanlock");
    // kanbanlock: end
} else {
    $db = new PDO("sqlite:$database");
}
$db->setAttribute(PDO::ATTR_TIMEOUT, 0);

// The line protocol of hosts/run.py: line_protocol.py says what it is.
$execute = function (string $sql, string ...$parameters) use ($db) {
    $statement = $db->prepare($sql);
    $statement->execute($parameters);
    return $statement->fetchColumn();
};
echo 'ready ', $execute('SELECT sqlite_version()'), "\n";
while (($line = fgets(STDIN)) !== false) {
    [$command, $text] = explode(' ', rtrim($line, "\n"), 2) + [1 => ''];
    try {
        $value = match ($command) {
            'begin' => $execute('BEGIN IMMEDIATE'),
            'write' => $execute('INSERT INTO task VALUES (?)', $text),
            'commit' => $execute('COMMIT'),
            'count' => $execute('SELECT count(*) FROM task'),
        };
        echo $value === false ? 'ok' : "ok $value", "\n";
    } catch (PDOException $error) {
        echo $error->errorInfo[1] === 5 ? 'busy' : "error {$error->getMessage()}", "\n";
    }
}
