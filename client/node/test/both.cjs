// The package as CommonJS code gets it.
const { attach, Keyring } = require("@resumed/node");
require("node:assert")(typeof attach === "function" && typeof Keyring.load === "function");
