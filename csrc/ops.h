#pragma once
// All operators, written once for all devices: each checks its arguments, describes the work without torch, and hands
// it to the device.
#include "ops/activation.h"
#include "ops/dropout.h"
#include "ops/gate.h"
#include "ops/norm.h"
#include "ops/pass.h"
#include "ops/pass_rows.h"
