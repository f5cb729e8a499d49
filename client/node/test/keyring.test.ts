import assert from "node:assert/strict";
import { chmodSync, chownSync, renameSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { mock, test } from "node:test";
import { inspect } from "node:util";

import { Keyring, ResumedError } from "../src/index.js";
import { directory, fleetKey, keyringFile, quiet } from "./support.js";

const line = (fill: number): string => `${Buffer.alloc(32, fill).toString("base64")}\n`;

test("a keyring file that cannot be used is refused in one line that says what to do and shows no key", () => {
  const almost = line(107).slice(1);
  const files: [string, string, number, string][] = [
    ["readable by others", line(1), 0o644, "chmod 600"],
    ["writable by group", line(1), 0o660, "chmod 600"],
    ["empty", "# nothing\n\n", 0o600, "holds no key"],
    ["not a key", line(1) + almost, 0o600, "line 2: not a key"],
    ["short key", "AAAA\n", 0o600, "line 1: not a key"],
  ];
  for (const [name, text, mode, complaint] of files) {
    const path = keyringFile();
    writeFileSync(path, text);
    chmodSync(path, mode);
    assert.throws(
      () => Keyring.load(path),
      (error: Error) =>
        error instanceof ResumedError &&
        error.message.includes(complaint) &&
        !error.message.includes(almost.trim()) &&
        !error.message.includes("\n"),
      name,
    );
  }
  assert.throws(() => Keyring.load(join(directory, "none")), /resumed keygen/);
  assert.throws(() => Keyring.fromKeys(), ResumedError);
  assert.throws(() => Keyring.fromKeys(Buffer.alloc(31)), ResumedError);
});

test("a keyring file is its user's or root's", { skip: !process.getuid && "no users here" }, (context) => {
  const path = keyringFile(fleetKey);
  const owner = statSync(path).uid;
  const user = context.mock.method(process as Required<NodeJS.Process>, "geteuid", () => owner + 1);
  if (owner === 0) chownSync(path, 1234, -1);
  assert.throws(() => Keyring.load(path), /another user owns it.*chown/);
  user.mock.mockImplementation(() => statSync(path).uid);
  Keyring.load(path);
  user.mock.mockImplementation(() => 0);
  Keyring.load(path);
});

test("a changed file is read again, one that cannot be used is reported once, and the keys read before stay", (context) => {
  let now = 0;
  const started = Date.now();
  context.mock.method(performance, "now", () => now);
  context.mock.method(Date, "now", () => started + now);
  const logger = { info: mock.fn(), warn: mock.fn(), error: mock.fn() };
  const path = keyringFile(Buffer.alloc(32, 1));
  const keyring = Keyring.load(path, logger);
  const shows = (): string => {
    for (let n = 0; n < 2; n++) {
      now += 1000;
      keyring.toString();
    }
    return keyring.toString();
  };
  const replace = (text: string): void => {
    writeFileSync(`${path}.new`, text, { mode: 0o600 });
    renameSync(`${path}.new`, path);
  };
  const loaded = keyring.lastReload;
  const before = shows();
  replace(`# rotated\n${line(2)}${line(1)}`);
  assert.equal(keyring.toString(), before); // at most once a second
  const after = shows();
  assert(after !== before && after.includes(before.slice("Keyring(".length, -1)));
  const rotated = keyring.lastReload;
  assert.deepEqual(loaded, { successful: true, time: started / 1000 });
  assert(rotated?.successful && rotated.time > loaded.time);
  replace("nonsense\n");
  assert.equal(shows(), after);
  assert.equal(shows(), after);
  assert.deepEqual(keyring.lastReload, { ...rotated, successful: false });
  assert.equal(logger.error.mock.callCount(), 1);
});

test("the middle of a change is not read: a file must look the same twice", (context) => {
  let now = 0;
  context.mock.method(performance, "now", () => now);
  const path = keyringFile(Buffer.alloc(32, 1));
  const keyring = Keyring.load(path, quiet);
  const before = keyring.toString();
  const look = (): string => {
    now += 1000;
    return keyring.toString();
  };
  const write = (text: string, age: number): void => {
    writeFileSync(path, text);
    utimesSync(path, 0, Date.now() / 1000 - age);
  };
  const justNow = -3600; // however slow the machine is
  write(line(2), justNow); // the second line is not written yet
  assert.equal(look(), before);
  write(line(2) + line(1), justNow);
  assert.equal(look(), before);
  assert.match(look(), /, /);
  write(line(3), 60); // found by the first look in a while
  assert.doesNotMatch(look(), /, /);
});

test("nothing that prints a keyring, or what holds one, prints a key", () => {
  const keyring = Keyring.fromKeys(fleetKey);
  const shown = [inspect({ keyring }, { depth: 9, showHidden: true }), JSON.stringify({ keyring }), String(keyring)].join();
  assert.match(shown, /Keyring\([0-9a-f]{8}\)/);
  for (const encoding of ["hex", "base64", "latin1"] as const) assert(!shown.includes(fleetKey.toString(encoding)));
  assert(!shown.includes("01 01 01 01") && !shown.includes("1,1,1,1"));
});
